from maira_sae.cli import main

if __name__ == "__main__":
    main()
