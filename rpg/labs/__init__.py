"""Labs: experiments of their own, each a folder with configuration, task and judge. The core knows them by name."""
