"""Times the network, labelling and fusion; every command has its own --help."""

from i3cl.cli.benchmark import main

if __name__ == "__main__":
    main()
