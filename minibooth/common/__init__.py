"""What every room uses: the one exception for users, files that are whole or not there, pictures
in files and on sheets, and the command line made from a dataclass.

Imports nothing else of minibooth.
"""
