"""The demo page without an installation of the package's scripts: `python apps/demo.py`, the same as `fixclip-app`."""

from fixclip_app.command import app

if __name__ == "__main__":
    app()
