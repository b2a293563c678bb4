"""``torchrun --nproc_per_node=4 -m torchtrt_md.run BUNDLE``: see :mod:`torchtrt_md.doors.run`."""

from torchtrt_md.doors.run import end_process, main

if __name__ == "__main__":
    end_process(main())
