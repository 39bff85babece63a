"""python -m luthier, as torchrun starts it."""

from luthier.cli.main import main

if __name__ == "__main__":
    main()
