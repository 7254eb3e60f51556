"""What is checked of arguments, energies, rows and data, and by whom log Z is needed."""
