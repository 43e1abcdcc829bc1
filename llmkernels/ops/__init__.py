"""The operations, a folder each; see a folder's README.md for its formula and conventions."""
