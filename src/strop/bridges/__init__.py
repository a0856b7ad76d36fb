"""In from other tools: their configs and scripts as recipes. Reads text; imports none of them, runs nothing."""
