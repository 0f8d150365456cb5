"""Labs: experiments of their own, each a folder with configuration, task and judge, and kinds of models.

The core knows them by name, in the tables of `rpg.tasks.config` and `rpg.models`; these are whole before any lab is.
"""

import rpg.models
import rpg.tasks  # noqa: F401
