"""The command `divergence-lens`: one file per group of commands, assembled in `main`.

Heavy libraries (torch, transformers, pandas, plotly) are imported inside the commands, so that
`--help` and usage errors answer at once.
"""
