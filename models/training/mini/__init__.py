"""The miniature models: their world of pictures and captions, and the programs that make and judge them."""
