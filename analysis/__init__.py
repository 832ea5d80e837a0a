"""Published records of trials in, parquet tables, statistics, figures and a report out."""
