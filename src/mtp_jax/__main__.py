"""python -m mtp_jax COMMAND; see mtp_jax.cli."""
import sys

from mtp_jax.cli.main import main

if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
