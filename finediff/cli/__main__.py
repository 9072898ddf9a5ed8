from finediff.cli import main

main()
