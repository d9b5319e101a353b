"""The tables, pages and plots of rankings and of what is made from them."""
