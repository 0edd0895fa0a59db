// Loads compose files as Docker Compose does, for each set of profiles, and lists the services that would run:
//
//	loader FILE,FILE cpu gpu,grafana
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
)

func main() {
	for _, profiles := range os.Args[2:] {
		options, err := cli.NewProjectOptions(
			strings.Split(os.Args[1], ","),
			cli.WithInterpolation(true),
			cli.WithProfiles(strings.Split(profiles, ",")),
		)
		if err == nil {
			project, failed := options.LoadProject(context.Background())
			if err = failed; err == nil {
				fmt.Println(profiles+":", strings.Join(project.ServiceNames(), " "))
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, profiles+":", err)
			os.Exit(1)
		}
	}
}
