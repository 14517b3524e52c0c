"""What JupyterLab reads when it is started in this folder, by `make lab` or by hand."""

c = get_config()  # noqa: F821 (Jupyter's)
c.ServerApp.contents_manager_class = "packlib.lab.contents.Contents"  # outputs stay out of tracked notebooks
c.LabApp.default_url = "/lab/tree/notebooks/00_start_here.ipynb"
