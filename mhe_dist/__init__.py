"""The training library: heads, banks, checkpoints and the loop. Knows neither Ray nor tars."""
