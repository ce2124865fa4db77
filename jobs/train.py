"""Train one recipe with Ray Train; the same command continues a run that was stopped."""

from i3cl.cli.train import main

if __name__ == "__main__":
    main()
