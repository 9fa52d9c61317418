"""Other programs that run artifacts, each in an environment of its own."""
