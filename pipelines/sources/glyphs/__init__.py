"""The glyph data set: characters of installed fonts as classes, drawn into tars."""
