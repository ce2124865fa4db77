"""Train the arms of a study with several seeds, measure them on the same images and print the differences with intervals."""

from i3cl.cli.study import main

if __name__ == "__main__":
    main()
