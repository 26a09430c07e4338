"""`python -m qlib_ext.cli`, as `qlib-ext`."""

from qlib_ext.cli import main

if __name__ == "__main__":
    main()
