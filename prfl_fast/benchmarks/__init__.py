"""What ``prfl-fast bench`` runs: each op and each headline beside what people use today, in one run on one device."""
