"""`python -m kleinctl`."""

from kleinctl.cli import main

if __name__ == "__main__":
    main()
