"""How fast the parts are that have a target: `make bench`. The topics lie in the folder `bench`."""

from bench.command import main

if __name__ == "__main__":
    main()
