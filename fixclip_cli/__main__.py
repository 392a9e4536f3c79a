"""`python -m fixclip_cli` is the command `fixclip`."""

from fixclip_cli.main import main

main()
