"""``python -m torchtrt_md``: the command line where its script is not installed."""

from torchtrt_md.doors.cli import main

if __name__ == "__main__":
    main()
