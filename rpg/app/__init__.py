"""A page in the browser for one trained generator: generate networks, inspect them, try them, download them."""

import os

# Read when Gradio is first imported: turns its usage reports off.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
