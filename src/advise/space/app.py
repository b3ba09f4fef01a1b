"""The page as a Hugging Face Space, at the Space's root beside `src/`: see README.md in this folder."""

from src.advise.page import look, page

if __name__ == "__main__":
    page().launch(**look())  # the Space's environment says where to listen
