"""The entry point of `fixclip`.

Heavy libraries are imported by the commands that need them, so that `fixclip --help` answers at once.
"""

# Each module adds its commands to the app, in the order of `fixclip --help`.
from fixclip_cli import generate, demo, doctor, evaluate_images, data, caption, weights, train, evaluate  # noqa: F401, I001
from fixclip_cli.app import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
