"""python -m mtp_jax COMMAND; see mtp_jax.cli."""
import os
import signal
import sys

if __name__ == '__main__':
  try:
    from mtp_jax.cli.main import main
    code = main(sys.argv[1:])
  except KeyboardInterrupt:  # during the imports
    code = 130
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more Ctrl-C ends at once, without a traceback
  if code == 1:  # threads of other packages may still wait for what failed, and print what they cannot write
    from mtp_jax.report.display import flush
    flush()
    os._exit(code)
  sys.exit(code)
