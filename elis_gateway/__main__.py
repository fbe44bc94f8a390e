"""``python -m elis_gateway``: the same as the console command ``elis-gateway``."""

from elis_gateway.cli import main

if __name__ == "__main__":
    main()
