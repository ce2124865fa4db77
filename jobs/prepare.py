"""Make data and starting weights; every command has its own --help."""

from i3cl.cli.prepare import main

if __name__ == "__main__":
    main()
