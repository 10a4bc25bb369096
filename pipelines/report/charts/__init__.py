"""Charts as SVG inside a page: no script draws them, and their colours are the page's."""
