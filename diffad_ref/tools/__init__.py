"""Behind the wall: what serves the book, comparison, the shell and other people's files.

Nothing in the flat part of the package imports anything from here; a test says so.
"""
