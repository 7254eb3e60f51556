"""Training that is saved and resumed."""
