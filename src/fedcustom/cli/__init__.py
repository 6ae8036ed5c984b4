"""The command line: parse the arguments, call the Python interface, print the result."""
