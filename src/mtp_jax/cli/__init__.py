"""The command line: flags in, lines or JSON out."""
