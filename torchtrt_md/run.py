"""``torchrun --nproc_per_node=4 -m torchtrt_md.run BUNDLE``: see :mod:`torchtrt_md.doors.run`."""

import os
import sys

import torchtrt_md

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0" and "--help" not in sys.argv:
        # Before PyTorch is imported, which takes seconds.
        print(f"torchtrt_md.run {torchtrt_md.__version__}: {' '.join(sys.argv[1:])}", flush=True)
    from torchtrt_md.doors.run import end_process, main

    end_process(main())
