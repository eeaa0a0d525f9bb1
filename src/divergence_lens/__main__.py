"""Run the command line with `python -m divergence_lens`."""

from divergence_lens.cli.main import app

app(prog_name="divergence-lens")
