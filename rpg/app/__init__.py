"""A page in the browser for one trained generator: ask for networks, look at them, try them, take them along."""

import os

# Read when Gradio is first imported: it reports nothing to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
