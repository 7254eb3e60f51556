"""Runs of many transitions: all chains at once, one by one, over ranks; their draws and stores."""
