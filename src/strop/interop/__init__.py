"""Import configs of other tools as recipes, and write job files for clusters. Text only: nothing is executed."""
