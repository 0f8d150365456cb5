"""A page in the browser for one trained generator: generate networks, inspect them, try them, download them."""

import os

# Read when Gradio is first imported: it reports nothing to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
