"""Where samples come from: files, folders, and whatever Python can iterate over.

    samples_from("evaluate.npz", graph)                      arrays by input name, with labels
    samples_from("pictures,resize=256", graph)               a folder of pictures, one folder for each class
    samples_from("glue,text=sentence,tokenizer=mine:encode", graph)   a Hugging Face dataset on disk, or parquet files
    samples_from("mine:batches", graph)                      what a function of this name returns
    samples_from(loader, graph)                              a torch DataLoader, or any iterable of batches

Options follow the path: `rows=0:100` or `rows=1::2` takes some samples, others are named where the kinds of files are.
"""

from hwopt.sources.request import Request, is_scoring, parse_request
from hwopt.sources.take import files_of, samples_from

__all__ = ["Request", "files_of", "is_scoring", "parse_request", "samples_from"]
