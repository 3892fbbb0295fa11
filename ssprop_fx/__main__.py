"""``python -m ssprop_fx``: the command ``ssprop-fx``."""

from .cli import main

if __name__ == "__main__":
    main()
