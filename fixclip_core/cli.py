"""Commands of `fixclip` that work on data, encoders and their numbers.

Every command imports what it needs when it runs, so `fixclip --help` stays free of open_clip and webdataset.
"""

import typer

app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(no_args_is_help=True, help="Prepare captioned images.")
app.add_typer(data_app, name="data")
