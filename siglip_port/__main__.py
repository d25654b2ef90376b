"""`python -m siglip_port`: the command `siglip-port`."""

from siglip_port.cli import main

if __name__ == "__main__":
    main()
