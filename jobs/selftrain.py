"""The whole circle: teachers, pseudo labels, student, evaluation, report. The same command continues where it stopped."""

from i3cl.cli.selftrain import main

if __name__ == "__main__":
    main()
