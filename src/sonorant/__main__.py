"""`python -m sonorant`, which is also what torchrun starts: `torchrun -m sonorant pretrain …`."""

from sonorant.cli import main

if __name__ == "__main__":
    main()
