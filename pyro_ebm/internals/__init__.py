"""What torch and Pyro do not promise to keep, each kind behind one small file.

Everything else in the package uses the public interfaces of torch and Pyro. A file here lists
the internals that it relies on, and for what. Where a version of torch or Pyro lacks one, importing
the package raises an ImportError that names it.
"""
