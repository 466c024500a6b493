"""The program: `python train.py COMMAND ...` is `python -m secateur COMMAND ...`."""

from secateur.program import run

if __name__ == "__main__":
    run()
