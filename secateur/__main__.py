"""`python -m secateur`: the program."""

from secateur.program import run

if __name__ == "__main__":
    run()
